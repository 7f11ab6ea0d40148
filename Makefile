PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

OLDEST := .venv-oldest/bin
OLDEST_INSTALLED := .venv-oldest/.installed

.PHONY: demo test test-slow test-oldest lint format clean

demo: $(INSTALLED)
	@$(BIN)/python examples/quickstart.py

test: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n auto -m "slow and not gpu"

test-oldest: $(OLDEST_INSTALLED)
	@$(OLDEST)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary

format: $(INSTALLED)
	@$(BIN)/ruff check --quiet --fix-only
	@$(BIN)/ruff format --quiet

clean:
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist outputs
	@find . -path './.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# Written last, so that an interrupted install starts again.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up .venv (once; this downloads PyTorch if it is not at hand)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[dev,report]" -c constraints.txt
	@touch $@

$(OLDEST_INSTALLED): pyproject.toml constraints-oldest.txt
	@echo "Setting up .venv-oldest (once; this downloads PyTorch if it is not at hand)"
	@test -x $(OLDEST)/python || $(PYTHON) -m venv .venv-oldest
	@$(OLDEST)/python -m pip install -qq --disable-pip-version-check -e ".[test,report]" -c constraints-oldest.txt
	@touch $@

"""`python -m oomguard` is the command `oomguard`."""

from oomguard.cli import app

app(prog_name="oomguard")

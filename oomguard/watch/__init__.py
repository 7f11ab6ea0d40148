<<<<<<< HEAD
"""What is watched during a run: readings of memory, their series, and the callbacks on them."""
=======
"""Watching a training run: what memory does, and what it does wrong. Nothing here changes it."""
>>>>>>> creep

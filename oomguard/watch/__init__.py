"""What is watched during a run: readings of memory, their series, and the callbacks on them."""

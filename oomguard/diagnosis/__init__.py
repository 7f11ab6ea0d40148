"""What in a training setup wastes memory: `diagnose` and its checks."""

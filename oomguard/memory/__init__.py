"""Memory in bytes: sizes as text, readings of the device, the storages behind tensors."""

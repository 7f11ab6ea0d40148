"""Memory in bytes: sizes as text, readings of the device."""

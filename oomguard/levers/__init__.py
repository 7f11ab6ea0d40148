"""Levers: the code that makes a live trainer obey a plan."""

"""Turns a Qwen2.5-VL checkpoint into an engine folder, one tensor at a time."""

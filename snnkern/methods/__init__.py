"""The published training methods, a file each."""

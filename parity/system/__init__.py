"""What the machine offers: devices, memory, files, progress, import targets."""

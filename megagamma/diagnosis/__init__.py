"""What of machines, disks, data and network would stop a run, found before it starts."""

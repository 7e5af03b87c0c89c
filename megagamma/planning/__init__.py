"""A run before it runs: FLOPs, memory, and a preview of its initialization. Arithmetic on shapes."""

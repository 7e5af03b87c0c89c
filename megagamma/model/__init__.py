"""The model: the map of its parameters, its Megatron-core modules, and how they are filled."""

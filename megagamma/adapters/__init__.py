"""The method in models that others have built: which logical matrices their tensors hold."""

"""TorchX components and named resources."""

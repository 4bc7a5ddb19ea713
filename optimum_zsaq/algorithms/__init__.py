"""One file a method's mathematics, over modules and tensors."""

"""The ops: arguments checked, layouts settled and autograd attached here; the work is done by a backend."""

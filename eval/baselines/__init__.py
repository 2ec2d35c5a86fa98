"""Other methods, on the same kernels and the same engine, so that differences are the methods'."""

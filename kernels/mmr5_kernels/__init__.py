"""Storage layouts of quantized weights, their reference arithmetic, and the choice of a kernel."""

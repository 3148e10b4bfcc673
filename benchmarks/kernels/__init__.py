"""`pytest benchmarks/kernels`: each op x backend x shape, beside the machine's ceilings."""

"""The subjects of the benchmark, one module each: `measure(bench)` gives its rows one by one."""

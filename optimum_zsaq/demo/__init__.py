"""The small language model of `optimum-cli zsaq demo`; see docs/demo.md."""

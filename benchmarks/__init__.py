"""Scripts that measure this project, one a question: ``python -m benchmarks.NAME``; results as JSON in ``results/``."""

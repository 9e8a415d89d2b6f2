"""The documentation site: `make docs` writes it to build/site, `make docs-serve` shows it.

The pages of docs/ are taken as they stand, docs/guide among them. Those of the gallery are made
here, from the registries of the library, the texts of docs/gallery and benchmarks/results.
"""

.PHONY: install test lint format docs
NATIVE = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

install:
	pip install -e ".[dev,plots,parquet]"

test:
	python -m pytest

lint:
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(NATIVE)

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(NATIVE)

docs:
	python -m mkdocs build --strict

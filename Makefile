.PHONY: install test lint format

install:
	pip install -e ".[dev,plots,parquet]"

test:
	python -m pytest

lint:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .
	clang-format -i csrc/*.cpp

.DEFAULT_GOAL := help
.PHONY: help install test nightly lint format types demo bench ci

help: ## Show this help
	@awk 'BEGIN { FS = ":.*## " } /^[a-z]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Install qir from this folder, editable, with all that the tests need
	pip install -e '.[test]'

test: ## Run the tests
	pytest

nightly: ## Run the tests with many random examples per property, a new seed each time
	pytest --hypothesis-profile=nightly

lint: ## Check style and layout of the source
	ruff check
	ruff format --check

format: ## Lay the source out anew, and mend what the linter can mend
	ruff check --fix
	ruff format

types: ## Check types, strictly
	mypy

demo: ## Compile the model that ships with qir and show every pass
	qir demo

bench: ## Run every benchmark
	pip install -e '.[bench]'
	for file in benchmarks/*.py; do echo "== $$file"; python "$$file" || exit 1; done

ci: ## Run all that a change must pass, from nothing, in fresh environments
	.ci/run

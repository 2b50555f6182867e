# make help lists the targets. Every run is a file target: -j runs them in parallel, an interrupted sweep or download resumes.
PY     ?= .venv/bin/python
DATA   ?= datasets/dlpfc
RUNS   ?= runs
SEEDS  ?= 0 1 2
SPLITS ?= random blocks slice
MODELS ?= full-cross full-gated concat gat_only gcn_only gcn_full-cross expr_only
HELD_OUT_MODELS ?= full-cross
FOLDS  ?= 0 1 2 3 4
MULTIST ?= default image:off image:permuted
LAUNCH ?=

$(foreach v,DATA RUNS HEST,$(if $(word 2,$($(v))),$(error $(v) is "$($(v))": make cannot handle spaces in a path, give one without (a link will do))))
ALL_12 := 151507 151508 151509 151510 151669 151670 151671 151672 151673 151674 151675 151676
here   := $(sort $(patsubst $(DATA)/%/spatial,%,$(wildcard $(DATA)/*/spatial)) $(patsubst $(DATA)/%.h5ad,%,$(wildcard $(DATA)/*.h5ad)))
public := $(filter datasets/dlpfc,$(patsubst %/,%,$(DATA)))
slices := $(or $(strip $(SLICES)),$(if $(public),$(ALL_12),$(here)))
wanted := $(if $(public),$(filter-out $(here),$(slices)))
# A mode that fuses has its fusion in the name of its run's folder.
fused   = $(foreach m,$(1),$(if $(filter full gcn_full multimodal,$(m)),$(m)-cross,$(m)))
name   := $(notdir $(patsubst %/,%,$(DATA)))
stamp  := $(if $(filter .venv/bin/python,$(PY)),.venv/.stamp)

.PHONY: help test test-long demo reproduce-dlpfc sweep domains ablations-multist reproduce-hest reproduce-her2st reproduce-ca1 reproduce ablations-hest ablations-cmrcnet ablations-spatia fetch fetch-hest report honest floors scale profile compare-flags mutate bench gpu-check clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

.venv/.stamp: requirements.txt
	test -x .venv/bin/pip || python3 -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/.stamp-dev: requirements-dev.txt .venv/.stamp
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@

test: $(if $(stamp),.venv/.stamp-dev)  ## the whole test suite (finds real data through PLAINST_DATA)
	$(PY) -m pytest -q -n 2 --dist worksteal

test-long: $(if $(stamp),.venv/.stamp-dev)  ## a night of tests: the long ones, ten times the damaged files, three random orders, kills, mutants, a small scale run
	$(PY) -m pytest -q -n 2 --dist worksteal -m long
	PLAINST_FUZZ=10 $(PY) -m pytest -q -n 2 --dist worksteal tests/test_fuzz.py
	for seed in 7 11 23; do $(PY) -m pytest -q -n 2 --dist loadfile --shuffle $$seed || exit 1; done
	$(PY) bench/kill_runs.py --out $(RUNS)/kills
	$(PY) bench/scale.py gat_fusion --sizes 2000 8000 --out $(RUNS)/scale_small
	$(PY) bench/mutate.py --n $(or $(N),20) --seed $(or $(SEED),0)

demo: $(stamp)  ## no download, no GPU: simulate a small cortex, H&E task and cell field, run every method shortly, write runs/demo/report.html
	rm -rf $(RUNS)/demo
	$(PY) -m plainst simulate cortex $(RUNS)/demo/cortex --n_spots 1000 --n_genes 500 --n_slices 2
	$(PY) -m plainst simulate hest $(RUNS)/demo/patches --n_spots 120 --patch_size 64
	$(PY) -m plainst simulate cells $(RUNS)/demo/cells.h5 --n_cells 800
	$(MAKE) --no-print-directory sweep DATA=$(RUNS)/demo/cortex RUNS=$(RUNS)/demo SLICES="sim1 sim2" SEEDS=0 FOLDS=0 MODELS="full-cross gcn_only expr_only" MULTIST=default
	$(PY) stformer.py --data $(RUNS)/demo/patches --epochs 15 --members 1 --runs $(RUNS)/demo
	$(PY) cmrcnet.py --data $(RUNS)/demo/patches --epochs 15 --runs $(RUNS)/demo
	$(PY) spatia.py --data $(RUNS)/demo/cells.h5 --steps_a 80 --steps_b 80 --steps_c 150 --draws 2 --ode_steps 4 --runs $(RUNS)/demo
	$(PY) -m evaluation.report --runs $(RUNS)/demo

# $(call siblings,slice): the other slices of its donor that are there; a name outside the DLPFC set takes all the others.
donors   := 151507+151508+151509+151510 151669+151670+151671+151672 151673+151674+151675+151676
donor    = $(subst +, ,$(foreach d,$(donors),$(if $(findstring $(1),$(d)),$(d))))
siblings = $(filter-out $(1),$(if $(strip $(call donor,$(1))),$(filter $(call donor,$(1)),$(slices)),$(slices)))
empty :=
space := $(empty) $(empty)
plus  = $(subst $(space),+,$(strip $(1)))
comma := ,

# One rule a run: $(1) slice, $(2) folder of the variant, $(3) model (mode or mode-fusion), $(4) flags of the split, $(5) seed
define a_run
runs_wanted += $(RUNS)/gat_fusion/$(name)/$(1)/$(2)-$(3)/seed$(5)/run.json
$(RUNS)/gat_fusion/$(name)/$(1)/$(2)-$(3)/seed$(5)/run.json: | $(stamp) $(if $(wanted),fetch)
	$(LAUNCH) $(PY) gat_fusion.py --data $(DATA) --slice $(1) $(4) --mode $(firstword $(subst -, ,$(3)))$(addprefix $(space)--fusion ,$(word 2,$(subst -, ,$(3)))) --seed $(5) --runs $(RUNS)
endef
$(foreach s,$(slices),$(foreach m,$(call fused,$(MODELS)),$(foreach k,$(SEEDS),\
  $(if $(filter random,$(SPLITS)),$(eval $(call a_run,$(s),random,$(m),--split random,$(k))))\
)))
$(foreach s,$(slices),$(foreach m,$(call fused,$(HELD_OUT_MODELS)),$(foreach k,$(SEEDS),\
  $(if $(filter blocks,$(SPLITS)),$(foreach f,$(FOLDS),$(eval $(call a_run,$(s),blocks$(f),$(m),--split blocks --fold $(f),$(k)))))\
  $(if $(filter slice,$(SPLITS)),$(if $(call siblings,$(s)),\
    $(eval $(call a_run,$(s),slice-$(call plus,$(call siblings,$(s))),$(m),--split slice --train $(subst $(space),$(comma),$(strip $(call siblings,$(s)))),$(k)))))\
)))

# multist: $(1) slice, $(2) `default`, or flag:value pairs joined by `+` in the order of --help, $(3) seed
define a_multist_run
multist_wanted += $(RUNS)/multist/$(name)/$(1)/$(call variant,$(2))/seed$(3)/run.json
$(RUNS)/multist/$(name)/$(1)/$(call variant,$(2))/seed$(3)/run.json: | $(stamp) $(if $(wanted),fetch)
	$(LAUNCH) $(PY) multist.py --data $(DATA) --slice $(1) $(foreach f,$(filter-out default,$(subst +, ,$(2))),$(subst --dec False,--no-dec,--$(subst :, ,$(f)))) --seed $(3) --runs $(RUNS)
endef
variant = default$(subst $(space),,$(foreach f,$(filter-out default,$(subst +, ,$(1))),-$(subst :,-,$(f))))
$(foreach s,$(slices),$(foreach v,$(MULTIST),$(foreach k,$(SEEDS),$(eval $(call a_multist_run,$(s),$(v),$(k))))))

# Genes from H&E. HEST is a HEST-benchmark task folder (TASK=IDC: the benchmark's own, downloaded), SECTIONS its slices to hold out one by one.
# $(1) method, $(2) fold or slice, $(3) folder of the variant, $(4) flags, $(5) seed
TASK     ?=
HEST     ?= datasets/$(if $(TASK),hest/$(TASK),her2st)
SECTIONS ?=
BACKBONE ?= features
hest     := $(notdir $(patsubst %/,%,$(HEST)))
hfolds   := $(patsubst $(HEST)/splits/test_%.csv,%,$(wildcard $(HEST)/splits/test_*.csv))
define a_hest_run
$(1)_wanted += $(RUNS)/$(1)/$(hest)/$(2)/$(3)/seed$(5)/run.json
$(RUNS)/$(1)/$(hest)/$(2)/$(3)/seed$(5)/run.json: | $(stamp)
	$(LAUNCH) $(PY) $(1).py --data $(HEST) $(4) --seed $(5) --runs $(RUNS) --cache $(RUNS)/.features
endef
retrieval = --backbone $(BACKBONE)
$(foreach k,$(SEEDS),$(foreach f,$(hfolds),$(eval $(call a_hest_run,stformer,fold$(f),mini,--fold $(f),$(k)))\
    $(eval $(call a_hest_run,cmrcnet,fold$(f),$(BACKBONE),--fold $(f) $(retrieval),$(k))))\
  $(foreach s,$(SECTIONS),$(eval $(call a_hest_run,stformer,$(s),section-mini,--split section --slice $(s),$(k)))\
    $(eval $(call a_hest_run,stformer,$(s),section-mini-interactions-p2p,--split section --slice $(s) --interactions p2p,$(k)))\
    $(eval $(call a_hest_run,cmrcnet,$(s),section-$(BACKBONE),--split section --slice $(s) $(retrieval),$(k)))))

# What retrieval depends on, one flag at a time.
RETRIEVAL := mask_rate:0.0 mask_rate:0.3 mask_rate:0.7 reconstruction:cosine reconstruction:cosine+mask_rate:0.0 reconstruction:cosine+mask_rate:0.3 \
  reconstruction:cosine+mask_rate:0.7 reconstruction:none k:10 k:100 k:500 shuffle_pairs:True norm_sim:True share:False weighting:softmax
flags_of   = $(subst --shuffle_pairs True,--shuffle_pairs,$(subst --norm_sim True,--norm_sim,$(subst --share False,--no-share,$(foreach f,$(subst +, ,$(1)),--$(subst :, ,$(f))))))
folder_of  = $(subst $(space),,$(foreach f,$(subst +, ,$(1)),-$(subst :,-,$(f))))
$(if $(ABLATE_CMRCNET),$(foreach v,$(RETRIEVAL),$(foreach k,$(SEEDS),$(foreach f,$(hfolds),\
  $(eval $(call a_hest_run,cmrcnet,fold$(f),$(BACKBONE)$(call folder_of,$(v)),--fold $(f) $(retrieval) $(call flags_of,$(v)),$(k))))\
  $(foreach s,$(SECTIONS),$(eval $(call a_hest_run,cmrcnet,$(s),section-$(BACKBONE)$(call folder_of,$(v)),--split section --slice $(s) $(retrieval) $(call flags_of,$(v)),$(k)))))))

# Controls of stformer on the SECTIONS: no context but through the pathways, no distance, gene sets, the same shuffled, images of other spots.
GMT      ?= datasets/hallmark/h.all.symbols.gmt
gmt_name := gene_sets-$(notdir $(GMT))$(if $(findstring /,$(GMT)),_$(shell printf %s '$(GMT)' | sha256sum | cut -c1-8))
define controls_of
$(eval $(call a_hest_run,stformer,$(1),section-mini-interactions-p2p+p2h+h2p,--split section --slice $(1) --interactions p2p$(comma)p2h$(comma)h2p,$(2)))
$(eval $(call a_hest_run,stformer,$(1),section-mini-distance_bias-False,--split section --slice $(1) --no-distance_bias,$(2)))
$(eval $(call a_hest_run,stformer,$(1),section-mini-permute_pairs-True,--split section --slice $(1) --permute_pairs,$(2)))
$(if $(wildcard $(GMT)),$(eval $(call a_hest_run,stformer,$(1),section-mini-$(gmt_name),--split section --slice $(1) --gene_sets $(GMT),$(2)))
$(eval $(call a_hest_run,stformer,$(1),section-mini-$(gmt_name)-shuffle_sets-True,--split section --slice $(1) --gene_sets $(GMT) --shuffle_sets,$(2))))
endef
$(if $(CONTROLS),$(foreach k,$(SEEDS),$(foreach s,$(SECTIONS),$(call controls_of,$(s),$(k)))))

# Single cells. CELLS is a cell file (python -m plainst convert, python -m plainst simulate cells); the public CA1 data is fetched and converted where it is lacking.
CELLS   ?= datasets/ca1/cells.h5
SPATIA  ?= default
FACTORIAL = $(foreach a,. mae:False,$(foreach b,. fusion:False,$(foreach c,. niche:False,$(foreach d,. tissue:False,$(subst .+,,$(a)+$(b)+$(c)+$(d)+generate:False)))))
cells   := $(if $(filter cells.h5,$(notdir $(CELLS))),$(notdir $(patsubst %/,%,$(dir $(CELLS)))),$(basename $(notdir $(CELLS))))
spatia_flags = $(foreach f,$(filter-out default,$(subst +, ,$(1))),$(if $(filter %:False,$(f)),--no-$(f:%:False=%),--$(subst :, ,$(f))))
define a_spatia_run
spatia_wanted += $(RUNS)/spatia/$(cells)/test-fold0/tiny-flow$(if $(filter default,$(1)),,$(call folder_of,$(1)))/seed$(2)/run.json
$(RUNS)/spatia/$(cells)/test-fold0/tiny-flow$(if $(filter default,$(1)),,$(call folder_of,$(1)))/seed$(2)/run.json: | $(stamp) $(CELLS)
	$(LAUNCH) $(PY) spatia.py --data $(CELLS) $(call spatia_flags,$(1)) --seed $(2) --runs $(RUNS)
endef
$(foreach v,$(SPATIA),$(foreach k,$(SEEDS),$(eval $(call a_spatia_run,$(v),$(k)))))

datasets/ca1/cells.h5: | $(stamp)
	$(PY) -m plainst download ca1 --out datasets/ca1
	$(PY) -m plainst convert ca1 datasets/ca1 $@

# Only asked for while slices of the public set are lacking. A file gets its name when it is whole, so an interrupted download goes on with the rest.
fetch: | $(stamp)
	$(PY) -m plainst download dlpfc --slices $(subst $(space),$(comma),$(strip $(wanted))) --out $(DATA)

sweep: $(runs_wanted) $(multist_wanted)
	@$(if $(strip $(slices)),,echo "error: DATA=$(DATA) holds no slice: give a folder of Visium folders or h5ad files, or leave DATA out for the public 12" >&2; exit 2)
	$(PY) -m evaluation.report --runs $(RUNS) --data $(name)

reproduce-dlpfc: sweep  ## MODELS on random spots, HELD_OUT_MODELS on blocks and slices, MULTIST, then the table; also DATA SLICES SEEDS SPLITS FOLDS LAUNCH

domains: $(multist_wanted)  ## multist alone: MULTIST="default image:off k:12+alpha:0.5" (flag:value), DATA SLICES SEEDS; then the table
	$(PY) -m evaluation.report --runs $(RUNS)/multist --data $(name)

# The questions the paper leaves open; every run is a file target, so it goes on where it stopped.
ABLATIONS := default image:off image:permuted image:zero mask_mode:none mask_mode:replace mask_mode:zero mask_rate:0.3 mask_rate:0.5 mask_rate:0.95 \
  alpha:0.0 alpha:0.3 alpha:0.5 alpha:0.9 alpha:1.0 k:3 k:12 k:18 gan:mean gan:fisher dec:False m:1 readout:fused diffusion_steps:0 diffusion_steps:10
ablations-multist:  ## image, mask, alpha, k, GAN, DEC, diffusion: one table with the spread over SEEDS
	$(MAKE) --no-print-directory domains MULTIST="$(ABLATIONS)"

reproduce-hest: $(if $(TASK),fetch-hest) $(stformer_wanted) $(cmrcnet_wanted)  ## stformer, cmrcnet, baselines on every split of HEST=<task folder>, or TASK=IDC (download); SECTIONS="C2 C3"
	@$(if $(hfolds)$(SECTIONS)$(TASK),,echo "error: HEST=$(HEST) holds no splits/test_<k>.csv: give a HEST-benchmark task folder" >&2; exit 2)
	$(if $(TASK),$(if $(hfolds),,$(MAKE) --no-print-directory reproduce-hest HEST=$(HEST) TASK=))
	$(if $(hfolds)$(SECTIONS),$(PY) -m evaluation.report --runs $(RUNS) --data $(hest) --out $(RUNS)/report_$(hest))

fetch-hest: $(stamp)
	$(if $(hfolds),,$(PY) -m plainst download hest --task $(TASK) --out datasets/hest)

reproduce-her2st:  ## the same on the HER2+ sections in HEST=datasets/her2st: its folds, and C2 to C5 one by one
	$(MAKE) --no-print-directory reproduce-hest SECTIONS="$(or $(strip $(SECTIONS)),C2 C3 C4 C5)"

ablations-cmrcnet:  ## mask rate and loss of the reconstruction, k, shuffled pairs, cosines: on HEST=<task folder> and SECTIONS
	$(MAKE) --no-print-directory reproduce-hest ABLATE_CMRCNET=1

ablations-hest:  ## controls of stformer on SECTIONS="C2 C3": bottleneck, no distance bias, permuted pairs, gene sets of GMT=<file> and the same shuffled
	$(MAKE) --no-print-directory reproduce-hest CONTROLS=1

honest: $(stamp)  ## a slice whose genes are noise: what random spots and held-out blocks make of it; runs/honest/report.html, and chart.png where reproduce-dlpfc ran
	test -d $(RUNS)/honest/noise/sim1 || $(PY) -m plainst simulate cortex $(RUNS)/honest/noise --n_slices 1 --n_spots 3600 --noise_genes
	$(MAKE) --no-print-directory sweep DATA=$(RUNS)/honest/noise RUNS=$(RUNS)/honest SLICES=sim1 MODELS=gcn_only HELD_OUT_MODELS=gcn_only SPLITS="random blocks" FOLDS=0 MULTIST=
	$(if $(wildcard $(RUNS)/gat_fusion),$(PY) bench/figure_honest.py --runs $(RUNS) --noise $(RUNS)/honest --slices random:151673 blocks:151673 slice:151674 --out $(RUNS)/honest/chart.png)

report: $(stamp)  ## every run so far, side by side: runs/report.html (one file), .md and figures
	$(PY) -m evaluation.report --runs $(RUNS)

reproduce-ca1: $(spatia_wanted)  ## spatia and baselines on CELLS=<cells.h5>, by default the public CA1 cells, fetched and converted
	$(PY) -m evaluation.report --runs $(RUNS) --data $(cells) --out $(RUNS)/report_$(cells)

ablations-spatia:  ## the factorial {MAE, fusion, niche, tissue} on the representation, and the merge ratio
	$(MAKE) --no-print-directory reproduce-ca1 SPATIA="default $(FACTORIAL) rho:0.25 rho:0.5"

reproduce: reproduce-dlpfc reproduce-her2st reproduce-ca1 report  ## everything, then the report

floors:  ## coordinates-only scores, no gene: make floors DATA=<folder of slices, labels are enough>
	$(MAKE) --no-print-directory sweep MODELS=coords_knn SPLITS=random SEEDS=0 MULTIST=

scale: $(stamp)  ## time and memory up to a million simulated spots, and a Visium HD slide of 600,000 bins (hours; PART=gat_fusion: one of it)
	$(PY) bench/scale.py $(or $(PART),all) --out $(RUNS)/scale

profile: $(stamp)  ## what the steps of the five training loops spend their time on
	$(PY) bench/profile_loops.py

compare-flags: $(stamp)  ## --bf16, --compile and one thread beside the default, in the five training loops: seconds and losses (hours)
	$(PY) bench/compare_flags.py --out $(RUNS)/flags

mutate: $(if $(stamp),.venv/.stamp-dev)  ## break N=20 random lines (SEED=0), one at a time, and see whether the tests notice (half an hour)
	$(PY) bench/mutate.py --n $(or $(N),20) --seed $(or $(SEED),0)

bench: $(if $(stamp),.venv/.stamp-dev)  ## ratios beside torch_geometric, scanpy and scikit-learn: runs/bench/bench.md (QUICK=--quick: only sees that it runs)
	$(PY) bench/speed.py all --out $(RUNS)/bench $(QUICK)

gpu-check: $(stamp)  ## every method on a CUDA GPU beside the CPU; says so and ends where there is none
	$(PY) bench/gpu_check.py --out $(RUNS)/gpu_check

clean:  ## delete the virtual environment and caches, keep runs and data
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ */__pycache__ */*/__pycache__

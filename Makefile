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

.PHONY: help test demo reproduce-dlpfc sweep domains ablations-multist reproduce-hest ablations-hest fetch report floors scale bench clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

.venv/.stamp: requirements.txt
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/.stamp-dev: requirements-dev.txt .venv/.stamp
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@

test: $(if $(stamp),.venv/.stamp-dev)  ## the whole test suite (finds real data through PLAINST_DATA)
	$(PY) -m pytest -q

demo: $(stamp)  ## no download, no GPU: simulate a small cortex, run every method, print the table, write runs/demo/report.png
	rm -rf $(RUNS)/demo
	$(PY) simulate.py cortex $(RUNS)/demo/data --n_spots 1000 --n_genes 500 --n_slices 2
	$(MAKE) --no-print-directory sweep DATA=$(RUNS)/demo/data RUNS=$(RUNS)/demo SLICES="sim1 sim2" SEEDS=0 FOLDS=0 MODELS="full-cross gcn_only expr_only" MULTIST=default

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

# stformer: $(1) fold or slice, $(2) folder of the variant, $(3) flags, $(4) seed. HEST is a HEST-benchmark task folder, SECTIONS its slices to hold out.
HEST     ?= datasets/her2st
SECTIONS ?=
hest     := $(notdir $(patsubst %/,%,$(HEST)))
hfolds   := $(patsubst $(HEST)/splits/test_%.csv,%,$(wildcard $(HEST)/splits/test_*.csv))
define an_stformer_run
stformer_wanted += $(RUNS)/stformer/$(hest)/$(1)/$(2)/seed$(4)/run.json
$(RUNS)/stformer/$(hest)/$(1)/$(2)/seed$(4)/run.json: | $(stamp)
	$(LAUNCH) $(PY) stformer.py --data $(HEST) $(3) --seed $(4) --runs $(RUNS) --cache $(RUNS)/.features
endef
$(foreach k,$(SEEDS),$(foreach f,$(hfolds),$(eval $(call an_stformer_run,fold$(f),mini,--fold $(f),$(k))))\
  $(foreach s,$(SECTIONS),$(eval $(call an_stformer_run,$(s),section-mini,--split section --slice $(s),$(k)))\
    $(eval $(call an_stformer_run,$(s),section-mini-interactions-p2p,--split section --slice $(s) --interactions p2p,$(k)))))

# Controls of stformer on the SECTIONS: no context but through the pathways, no distance, gene sets, the same shuffled, images of other spots.
GMT      ?= datasets/hallmark/h.all.symbols.gmt
gmt_name := gene_sets-$(notdir $(GMT))$(if $(findstring /,$(GMT)),_$(shell printf %s '$(GMT)' | sha256sum | cut -c1-8))
define controls_of
$(eval $(call an_stformer_run,$(1),section-mini-interactions-p2p+p2h+h2p,--split section --slice $(1) --interactions p2p$(comma)p2h$(comma)h2p,$(2)))
$(eval $(call an_stformer_run,$(1),section-mini-distance_bias-False,--split section --slice $(1) --no-distance_bias,$(2)))
$(eval $(call an_stformer_run,$(1),section-mini-permute_pairs-True,--split section --slice $(1) --permute_pairs,$(2)))
$(if $(wildcard $(GMT)),$(eval $(call an_stformer_run,$(1),section-mini-$(gmt_name),--split section --slice $(1) --gene_sets $(GMT),$(2)))
$(eval $(call an_stformer_run,$(1),section-mini-$(gmt_name)-shuffle_sets-True,--split section --slice $(1) --gene_sets $(GMT) --shuffle_sets,$(2))))
endef
$(if $(CONTROLS),$(foreach k,$(SEEDS),$(foreach s,$(SECTIONS),$(call controls_of,$(s),$(k)))))

# Only asked for while slices of the public set are lacking. A file gets its name when it is whole, so an interrupted download goes on with the rest.
fetch: | $(stamp)
	$(PY) download.py dlpfc --slices $(subst $(space),$(comma),$(strip $(wanted))) --out $(DATA)

sweep: $(runs_wanted) $(multist_wanted)
	@$(if $(strip $(slices)),,echo "error: DATA=$(DATA) holds no slice: give a folder of Visium folders or h5ad files, or leave DATA out for the public 12" >&2; exit 2)
	$(PY) report.py --runs $(RUNS) --data $(name)

reproduce-dlpfc: sweep  ## MODELS on random spots, HELD_OUT_MODELS on blocks and slices, MULTIST, then the table; also DATA SLICES SEEDS SPLITS FOLDS LAUNCH

domains: $(multist_wanted)  ## multist alone: MULTIST="default image:off k:12+alpha:0.5" (flag:value), DATA SLICES SEEDS; then the table
	$(PY) report.py --runs $(RUNS)/multist --data $(name)

# The questions the paper leaves open; every run is a file target, so it goes on where it stopped.
ABLATIONS := default image:off image:permuted image:zero mask_mode:none mask_mode:replace mask_mode:zero mask_rate:0.3 mask_rate:0.5 mask_rate:0.95 \
  alpha:0.0 alpha:0.3 alpha:0.5 alpha:0.9 alpha:1.0 k:3 k:12 k:18 gan:mean gan:fisher dec:False m:1 readout:fused diffusion_steps:0 diffusion_steps:10
ablations-multist:  ## image, mask, alpha, k, GAN, DEC, diffusion: one table with the spread over SEEDS
	$(MAKE) --no-print-directory domains MULTIST="$(ABLATIONS)"

reproduce-hest: $(stformer_wanted)  ## stformer on HEST=<HEST-benchmark task folder>, every split; SECTIONS="C2 C3" holds out sections too, with a patch-only control
	@$(if $(hfolds)$(SECTIONS),,echo "error: HEST=$(HEST) holds no splits/test_<k>.csv: give a HEST-benchmark task folder" >&2; exit 2)
	$(PY) report.py --runs $(RUNS)/stformer --data $(hest)

ablations-hest:  ## controls of stformer on SECTIONS="C2 C3": bottleneck, no distance bias, permuted pairs, gene sets of GMT=<file> and the same shuffled
	$(MAKE) --no-print-directory reproduce-hest CONTROLS=1

report: $(stamp)  ## every run so far, side by side: runs/report.html (one file), .md and figures
	$(PY) report.py --runs $(RUNS)

floors:  ## coordinates-only scores, no gene: make floors DATA=<folder of slices, labels are enough>
	$(MAKE) --no-print-directory sweep MODELS=coords_knn SPLITS=random SEEDS=0 MULTIST=

scale: $(stamp)  ## multist and stformer up to 100,000 simulated spots: time and memory, runs/scale/scale_*.png
	$(PY) tests/scale_multist.py $(RUNS)/scale
	$(PY) tests/scale_stformer.py $(RUNS)/scale

bench: $(if $(stamp),.venv/.stamp-dev)  ## graph attention against torch_geometric
	$(PY) tests/bench_attention.py

clean:  ## delete the virtual environment and caches, keep runs and data
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__

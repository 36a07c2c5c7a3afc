from gte_deploy.core.quiet import keep_caches_in_ours

# Before any module of this package imports PyTorch or Matplotlib.
keep_caches_in_ours()

"""Home of the Triton kernels; installed as `ckd._triton`.

`triton_kernels` is also the import name of a package of the Triton project, so modules here use
relative imports only and are never imported under their folder's name.
"""

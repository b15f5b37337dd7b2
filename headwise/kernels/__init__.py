"""How it is fast: Triton kernels, one file per function of `headwise.functional`.

Import nothing from here where Triton is absent; the functions dispatch.
"""

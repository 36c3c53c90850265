"""The operators in Triton, a file a family; `registry` registers them.

Nothing is imported here: at the root of a checkout whoever looks for another package named `kernels` finds this one.
"""

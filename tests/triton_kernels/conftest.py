import triton

if triton.knobs.runtime.interpret:
    from . import gpu_arithmetic

    gpu_arithmetic.install()

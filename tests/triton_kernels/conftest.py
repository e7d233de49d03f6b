import triton

if triton.knobs.runtime.interpret:
    import gpu_arithmetic

    gpu_arithmetic.install()

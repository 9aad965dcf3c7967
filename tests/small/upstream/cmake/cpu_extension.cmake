file(GLOB VLLM_CPU_SOURCES csrc/cpu/*.c)

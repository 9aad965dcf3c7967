extern "C" int triton_small_first() { return 1; }

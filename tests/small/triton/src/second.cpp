extern "C" int triton_small_second() { return 2; }

"""What this machine has and lacks: hardware, toolchain, environment, doctor."""

package bench

//go:generate go tool bpf2go -cc clang-19 -target bpfel,bpfeb -output-suffix= rig rig.bpf.c -- -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu

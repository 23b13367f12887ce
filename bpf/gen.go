// Package bpf holds the datapath: the TC programs in C, and what bpf2go makes of them.
//
// nat.bpf.c has the entry programs, each header one stage of a packet's way, abi.h every
// structure that a map holds. Go here is generated code and tests; typed access to the
// maps is package maps, the programs' lifecycle is package loader.
package bpf

//go:generate go tool bpf2go -cc clang-19 -target bpfel,bpfeb -output-suffix= -type counter -type timeout -type family -type device_class -type role -type translation -type tcp_seen -type mapping_bits -type held -type life -type dnat_flag -type snat_flag -type attach_kind -type device_flag -type config_flag -type fast_path -type adjacency_flag -type adjacency_state -type unleased -type uplink_bits -type affinity_key -type affinity -type rules_word -type dnat_kind NAT nat.bpf.c -- -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu

// Package dockertest runs the scenario that tcnat is for on a real Docker.
//
//	container 172.17.0.2:3005 ── docker0 [host] eth0 203.0.113.2 ── router ── isp ── [world] 198.51.100.2, lo 1.1.1.1
//
// dockerd runs in the lab's host namespace with --iptables=false, in mount and pid namespaces
// of its own: whatever it mounts and starts ends with it, and it ends with the test process.
// The image is made of a static busybox and the program in directory peer; nothing is pulled.
package dockertest

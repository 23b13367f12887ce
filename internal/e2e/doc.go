// Package e2e tests the datapath and its loader end to end, in the network namespaces of
// package lab: real sockets, real routing, every hook. It has tests only.
//
// Each test builds its own lab and its own instance, and ends with the check that detach
// left nothing: no program, map, pin, qdisc or changed sysctl. Most run for both ways to
// attach and for both address families.
//
// TCNAT_TEST_LONG=1 makes the transfers 1 GB instead of 100 MB; -short makes them 10 MB.
package e2e

// Package judge compares tcnat with netfilter, packet by packet. It has tests only.
//
// Two equal worlds stand side by side: containers on a bridge, their host, and the outside
// behind its uplink. In one the host translates by nftables, in the other by tcnat, by the
// same rules. Both carry the same random conversations: steps of a script, each of which is one
// packet that an end sends. A step is symbolic where it must be: an answer goes to whom the end
// has heard of in its world, an ICMP error quotes what the end received there. What
// arrives at each end is then compared byte for byte, but for ports that the NAT chose.
//
// Everything is drawn from a seed, which is printed. To see one conversation again:
//
//	go test ./internal/judge -run TestJudge -seed 1 -conversation 42
//
// -conversations N says how many; TCNAT_TEST_LONG=1 stands for 100,000. Differences that are known and
// allowed are listed, with the reason, in known_test.go; -strict NAME fails for one of them, too.
package judge

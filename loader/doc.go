// Package loader manages the programs' lifecycle: load, attach, upgrade in place, detach.
//
// An instance is one datapath of one network namespace. It lives in pins alone:
//
//	<bpffs>/tcnat/<name>/v<ABI>/maps/<map>
//	                           /progs/<program>
//	                           /progs/build/<program>=<id>-<hash>  directories: what they were loaded from
//	                           /fast-path/<word>                   a directory: what attach was asked for
//	                           /links/<ifindex>-<ingress|egress>   TCX only
//	                           /qdiscs/<ifindex>                   directories: clsact qdiscs that we made
//
// Sysctls that it had to change are noted beside the lock, in <run>/<name>.sysctl, with what they were.
//
// Its states, and what moves it:
//
//	absent --Attach--> staged --rename--> dark --config.live=1--> live
//	  ^                  |                 |                       |  \
//	  |                  | killed          | killed: Attach        |   Attach: upgraded in place,
//	  |                  v                 v finishes it           |   maps stay, programs are swapped
//	  +---- the next Attach or Detach sweeps <name>+new           |
//	  +---- Detach: config.live=0, rename to <name>+old, remove <--+
//
// Programs pass every packet on while config.live is 0, so that one write is what makes a
// datapath act, and what ends it. Whatever is killed, the old state or the new one stays.
//
// Every function works in the network namespace of the calling thread; see [InNetns].
package loader

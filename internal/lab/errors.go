package lab

import "errors"

var (
	// ErrExists indicates that a namespace of the lab's name is there already.
	ErrExists = errors.New("exists already")
	// ErrNotFound indicates that no lab of that name is there.
	ErrNotFound = errors.New("no such lab")
	// ErrNotPermitted indicates that namespaces cannot be made with the caller's rights.
	ErrNotPermitted = errors.New("not permitted: needs CAP_SYS_ADMIN and CAP_NET_ADMIN (try sudo)")
	// ErrNeedsProcess indicates that the lab has a part that ends with its process.
	ErrNeedsProcess = errors.New("a tun uplink ends with its process")
	// ErrBadOptions indicates options that no lab can be built from.
	ErrBadOptions = errors.New("bad options")
	// ErrNoReply indicates that neither an answer nor an ICMP error came in time.
	ErrNoReply = errors.New("no reply")
	// ErrNotIntact indicates that other bytes arrived than were sent.
	ErrNotIntact = errors.New("data not intact")
	// ErrFailed indicates that a step of the demo did not do what it says.
	ErrFailed = errors.New("demo failed")
)

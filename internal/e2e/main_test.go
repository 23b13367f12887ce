package e2e

import (
	"flag"
	"os"
	"strconv"
	"testing"
)

// side is how many of the tests that run beside others do so: these wait more than they work.
const side = 4

func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f != nil {
		if n, err := strconv.Atoi(f.Value.String()); err == nil && n < side {
			_ = flag.Set("test.parallel", strconv.Itoa(side))
		}
	}
	go machine.watch()
	os.Exit(m.Run())
}

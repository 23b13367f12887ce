package e2e

import (
	"os"
	"strconv"
	"time"
)

// slowEnv is how many times slower than usual the machine is, 1 to 100: an emulated one.
const slowEnv = "TCNAT_TEST_SLOW"

// slowly is what a time for the machine's own work becomes on a slow machine.
func slowly(d time.Duration) time.Duration {
	if factor, err := strconv.ParseFloat(os.Getenv(slowEnv), 64); err == nil && factor >= 1 && factor <= 100 {
		return time.Duration(factor * float64(d))
	}
	return d
}

package bpf_test

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"tcnat/bpf"
)

// stopExpiry cancels the expiry's timer, as nothing in the datapath does.
func (d *datapath) stopExpiry() {
	d.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS,
		Instructions: asm.Instructions{
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, d.Expiry.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "end"),
			asm.Mov.Reg(asm.R1, asm.R0), // the timer is the first member of struct expiry
			asm.FnTimerCancel.Call(),
			asm.Mov.Imm(asm.R0, 0).WithSymbol("end"),
			asm.Return(),
		},
		License: "GPL",
	})
	d.check(err)
	defer program.Close()
	_, err = program.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	d.check(err)
}

func (d *datapath) expiry() (e bpf.NATExpiry) {
	d.Helper()
	d.check(d.Expiry.Lookup(uint32(0), &e))
	return e
}

// A new flow finds out when nobody ends flows any longer.
func TestExpiryOverdue(t *testing.T) {
	d := load(t, 1024)
	d.setRules(ruleSet{snat: []snatRule{{source: families[0].subnet, masquerade: true}}})
	open := func(port uint16, want uint64) {
		t.Helper()
		before := d.counts()
		d.path(families[0], udp).as(families[0].uplink, 0).by(families[0].container, port).open()
		if got := d.counts().since(before)[bpf.NATCounterEXPIRY_OVERDUE]; got != want {
			t.Errorf("port %d: counted %d times, want %d", port, got, want)
		}
	}
	open(20000, 1) // never started
	d.startExpiry()
	open(20001, 0)
	d.until("the first tick", 5*time.Second, func() bool { return d.expiry().Ticks > 0 })
	open(20002, 0)
	d.stopExpiry()
	stopped := d.expiry().Ticks
	d.until("a new flow tells", 5*time.Second, func() bool {
		before := d.counts()
		d.path(families[0], udp).as(families[0].uplink, 0).by(families[0].container, 20003).open()
		d.forget()
		return d.counts().since(before)[bpf.NATCounterEXPIRY_OVERDUE] == 1
	})
	if now := d.expiry().Ticks; now != stopped {
		t.Fatalf("%d ticks after its end", now-stopped)
	}
	d.startExpiry()
	open(20004, 0)
	d.until("it ticks again", 5*time.Second, func() bool { return d.expiry().Ticks > stopped })
}

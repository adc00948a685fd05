package supervisor

import (
	"errors"

	"fcvm/internal/guest"
	"fcvm/internal/image"
	"fcvm/internal/vmm/engines"
)

// fillIn completes options with what this build has.
func fillIn(o *Options) error {
	if o.Layout == nil {
		return errors.New("supervisor has no data directory")
	}
	if o.Engines == nil {
		o.Engines = engines.All(o.Layout)
	}
	if o.Images == nil {
		store, err := image.Open(o.Layout.Images())
		if err != nil {
			return err
		}
		o.Images = store
	}
	if o.Guest == nil {
		dir := o.Layout.Guest()
		o.Guest = func() (*guest.Assets, error) { return guest.Open(dir) }
	}
	if o.PageServers == nil {
		o.PageServers = launcher{}
	}
	return nil
}
